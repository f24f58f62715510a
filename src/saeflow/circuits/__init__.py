"""Circuits through transcoders (Dunefsky, Chlenski, Nanda 2024, section 4): what in the model makes a latent active.

`weights` has what the weights alone say, `attribution` what adds up to a pre-activation on a text, `paths` how most of
it comes about; `study` makes the tables of the stage of these.
"""
