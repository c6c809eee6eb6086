"""Workers: the queue handed out, processes that render, what they report."""
