"""A federation across sites: its certificates and kits, the processes of server and sites, and their care."""
