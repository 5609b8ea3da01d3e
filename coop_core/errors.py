"""What can go wrong, as one tree; every message is one sentence: what, where, which value, the way out.

    CoopError
    |-- ParamsError       params.yaml: unknown keys, values out of range, impossible combinations
    |-- DatasetError      dataset cards, image folders, CSV files, unreadable images
    |-- SplitError        too few images for the shots that are asked
    |-- BackboneError     architectures, weights, text-tower families that cannot be served
    |-- PromptError       class names and context vectors that do not fit the text tower
    |-- TrainingError     a loss that is no number, a checkpoint that does not belong
    |-- ArtifactError     damaged or foreign artefacts
    |-- GateError         promotions that the gate refuses or cannot judge
    |-- WatchError        nothing that the watch could compare: no records, no champion, no reference
    `-- ServiceError      sources, storage and tracking servers that do not answer
"""


class CoopError(Exception):
    """Any fault a user can mend; the command line shows its text alone and exits with status 2."""


class ParamsError(CoopError):
    pass


class DatasetError(CoopError):
    pass


class SplitError(CoopError):
    pass


class BackboneError(CoopError):
    pass


class PromptError(CoopError):
    pass


class TrainingError(CoopError):
    pass


class ArtifactError(CoopError):
    pass


class GateError(CoopError):
    pass


class WatchError(CoopError):
    pass


class ServiceError(CoopError):
    pass
