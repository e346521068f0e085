"""HeRA (Head-Wise Representation Alignment, arXiv 2606.23885) as a stage of LLaMA-Factory.

The maths and the head capture are importable without the host::

    from llamafactory_hera.alignment import contrastive_loss, mutual_knn, nearest_neighbors
    from llamafactory_hera.heads import HeadCapture

Importing this package loads nothing heavy: it happens in every interpreter that imports LLaMA-Factory.
"""

__version__ = "0.3.0"
