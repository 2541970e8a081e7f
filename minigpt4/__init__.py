"""MiniGPT-4 backbone: pictures and text in, language-model states out."""
