"""Figures of evaluations: fronts of dictionaries and their differences (`fronts`), every pair of them (`pairs`), and
how active latents are spread, several layers at once, the transcoder paper's tables (`measures`)."""
