"""Pages and metrics of a federation and of experiments; all they show is read from journals and from a server's kit."""
