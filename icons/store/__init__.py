"""Gradient and score stores: Zarr groups whose row i is record i of the data file, written unit by unit.

    gradient_store.py, score_store.py   what is stored; both are a
    row_store.py                        group of arrays over rows, with a status per row that is written last
    layout.py                           which arrays, in which chunks and codecs
    chunk.py                            one chunk of one array, as bytes
    encoding.py                         float32 results -> the stored dtype
    manifest.py                         what a store was made from, and whether two agree
    storage.py                          whole keys, in an object store or a
    folder.py                           folder: atomic files, durable when it counts
    lease.py                            which run is computing which unit
    unit_writer.py                      rows -> units -> the store, from background threads
    verify.py                           is every chunk there, whole, and in agreement with its status?

Only files of this folder name zarr.
"""

from icons.agreement import check_compatible
from icons.store.gradient_store import GradientStore, UnitRows, fitting_chunk_rows, open_store
from icons.store.score_store import ScoreStore

__all__ = ["GradientStore", "ScoreStore", "UnitRows", "check_compatible", "fitting_chunk_rows", "open_store"]
