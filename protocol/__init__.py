"""Code that server and clients share: record names, array codec, settings, and access to Flower's private API."""
