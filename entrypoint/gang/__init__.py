"""A gang that does not start in time, its nodes given back and tried again later."""
