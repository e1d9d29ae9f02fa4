"""From labelled Parquet traces to groups: one row is one prompt with all of its responses."""
