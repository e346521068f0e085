"""HeRA (Head-Wise Representation Alignment, arXiv 2606.23885) as a stage of LLaMA-Factory.

The mathematics and the head capture can be imported without LLaMA-Factory::

    from llamafactory_hera.alignment import contrastive_loss, mutual_knn, nearest_neighbors
    from llamafactory_hera.heads.capture import HeadCapture

Importing this package loads nothing heavy, because every interpreter that imports LLaMA-Factory imports it.
"""

__version__ = "0.3.0"
