"""Frames to files and files to frames: everything here takes or gives uint8 RGB [F, H, W, 3]."""
