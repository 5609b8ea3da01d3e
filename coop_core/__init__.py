"""Prompt learning for frozen CLIP-like models: images and class names in, context vectors and reports out.

The way of the data, one module a step:

    catalog -> importers -> validation -> dataset -> split -> images, backbone, features
            -> prompt -> text_encoding -> methods, training -> artifact -> evaluation -> report

Nothing here reads an environment variable or talks to a service; that is what `pipelines` is for.
"""
