"""The kinds of sparse dictionary, one module each: what `dictionary.kind` can be. Imported by every plan, so light."""
