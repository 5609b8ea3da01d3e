"""Who is right: classifiers to beat, metrics on test images, and the gate that decides on a champion."""
