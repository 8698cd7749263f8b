"""What server and sites say to each other: record names, the codec, and the shim to what Flower keeps private."""
