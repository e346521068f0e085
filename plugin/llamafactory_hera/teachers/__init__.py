"""The teacher: its input images, the frozen vision encoder, and a cache of its features on disk."""
