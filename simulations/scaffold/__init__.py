"""What `corymb new` begins from, and the promises that every rule keeps."""
