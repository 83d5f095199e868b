"""Models as one file for llama.cpp, in the format GGUF, and the proof that the file computes the same."""
