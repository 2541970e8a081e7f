"""Training of the tiny world's foundation models from scratch, in resumable parts."""
