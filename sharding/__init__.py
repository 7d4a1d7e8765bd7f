"""The corpus: text to token rows to tar shards and a manifest; the order; the stream that reads them."""
