"""What is in the traces: one read into arrays, then numbers, a recommendation and a page of text made from them."""
