"""What a client does besides plain local training: one file per method."""
