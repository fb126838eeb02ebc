"""Raw data sets -> shards."""
