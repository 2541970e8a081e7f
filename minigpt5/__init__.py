"""MiniGPT-5: interleaved vision-and-language generation via generative vokens (arXiv 2310.02239)."""
