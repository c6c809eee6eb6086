"""What the video is of: the prompt timeline and the text encoders."""
