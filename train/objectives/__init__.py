"""What is learnt, and how it is judged; knows arrays and models, not options or files."""
