"""Frozen vision encoders: raw images to features by the teacher's own processor, and the features' cache on disk."""
