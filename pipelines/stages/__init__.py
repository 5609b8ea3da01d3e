"""The stages of dvc.yaml, in order; each reads files, calls the core once and writes files.

    download -> split -> features -> baselines, train -> evaluate -> report -> track
"""
