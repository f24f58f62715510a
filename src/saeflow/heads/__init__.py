"""How the heads of an attention layer share and mix what dictionaries find in them. `stage` is the workflow's job; the
other modules are plain functions of dictionaries, weights and activations at `blocks.L.attn.hook_z`."""
