"""What is to be told apart: sources -> a checked data set -> a few-shot split, and images as pixels."""
