"""Models whose algorithm is known: programs, their compiled transformers, trained ones, and what a dictionary of them
finds. The cases are those of InterpBench (Gupta et al. 2024, arXiv 2407.14494), compiled by Tracr's rules (Lindner et
al. 2023, arXiv 2301.05062) without Tracr or JAX."""
