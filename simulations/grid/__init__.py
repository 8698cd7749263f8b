"""Where clients run: in this process, in Flower's simulation, online or not."""
