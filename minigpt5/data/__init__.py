"""From published data layouts to batches: reader → ``Sample`` → encode → collate → ``Batch``."""
