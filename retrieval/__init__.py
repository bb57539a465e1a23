"""Question to ranked chunks: embedders, FAISS, BM25, fusion."""
