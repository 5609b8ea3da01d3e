"""A sweep under way: trainers in processes of their own, and what is seen of them."""
