"""From a data file to batches: records, images, conversations, samplers, LightningDataModules."""
