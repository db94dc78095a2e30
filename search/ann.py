"""faiss over codes: an index that compares all of them, and one of inverted lists.

The score of an image of code c for a query vector q is the sum over m of q_m . codewords[m, c_m]: an inner product with
the image's reconstruction, so that faiss's product quantizers search learned codebooks once these are copied in.
Positions are those of the codes, 0 ... n - 1. Reading an index is safe from several threads.

n images, codes `[n, M]`; codewords `[M, K, d]` float32; query vectors `[q, M d]` float32.
"""

from pathlib import Path

import faiss
import numpy as np

from utils import InputError, atomic_write

MOST_FLAT = 2_000_000  # images, of which comparing all takes about ten milliseconds
NPROBE = 64  # lists visited per query, unless it says otherwise
RECALL_AT = (10, 100)
CHUNK = 65536  # images
TRAINING = 64  # images per list that k-means sees, on the average
ROUNDS = 10  # of k-means


def kind_for(n: int) -> str:
    """The kind of index for n images: "flat" compares all codes, "ivf" those of the nearest lists."""
    return "flat" if n <= MOST_FLAT else "ivf"


def nlist_for(n: int) -> int:
    """The number of lists for n images: the power of two that is nearest to sqrt(n)."""
    return 2 ** round(np.log2(max(n, 1)) / 2)


# ---------------------------------------------------------------- building


def build(path: Path, codewords: np.ndarray, codes: np.ndarray, kind: str, query_vectors: np.ndarray) -> dict:
    """Write the index of some codes, "flat" or "ivf", atomically. Returns its description for `index.json`: the kind,
    the number of lists, and the recall of the query vectors' best scores, against comparing all.

    Raises InputError if there are no codes.
    """
    flat = build_flat(codewords, codes)
    if kind == "flat":
        write(flat, path)
        return {"kind": "flat", "nlist": 0, "recall": {}}
    ivf = build_ivf(codewords, codes, nlist_for(len(codes)))
    write(ivf, path)
    return {"kind": "ivf", "nlist": ivf.nlist, "recall": recall(ivf, flat, query_vectors)}


def build_flat(codewords: np.ndarray, codes: np.ndarray) -> faiss.IndexPQ:
    """An index that compares all codes. Raises InputError if there are none."""
    _refuse_none(codes)
    merged = merged_codewords(codewords)
    M, K, d = merged.shape
    index = faiss.IndexPQ(M * d, M, bits_of(K), faiss.METRIC_INNER_PRODUCT)
    _set_codewords(index, merged)
    for start in range(0, len(codes), CHUNK):
        index.add_sa_codes(packed(codes[start : start + CHUNK], codewords.shape[1]))
    return index


def build_ivf(codewords: np.ndarray, codes: np.ndarray, nlist: int, seed: int = 0) -> faiss.IndexIVFPQ:
    """An index of at most `nlist` inverted lists. The same seed gives the same lists. Raises InputError if there are no
    codes."""
    _refuse_none(codes)
    nearest, means = train_lists(codewords, codes, min(nlist, len(codes)), seed)
    merged = merged_codewords(codewords)
    M, K, d = merged.shape
    index = faiss.IndexIVFPQ(means, M * d, means.ntotal, M, bits_of(K), faiss.METRIC_INNER_PRODUCT)
    index.own_fields = True
    means.this.disown()
    index.by_residual, index.nprobe = False, min(NPROBE, means.ntotal)
    _set_codewords(index, merged)
    width = index.coarse_code_size()  # bytes of a list's number, before the code
    for start in range(0, len(codes), CHUNK):
        part = codes[start : start + CHUNK]
        lists = nearest.search(reconstructions(codewords, part), 1)[1]
        index.add_sa_codes(np.hstack([lists.view(np.uint8)[:, :width], packed(part, codewords.shape[1])]))
    return index


def train_lists(
    codewords: np.ndarray, codes: np.ndarray, nlist: int, seed: int
) -> tuple[faiss.IndexFlatIP, faiss.IndexFlatIP]:
    """Lists by spherical k-means of the reconstructions of some codes: an index of their centres, of unit length, by
    which an image's list is found, and one of their images' means, by which a query's lists are: its inner product with
    a mean is the mean score of a list's images, also if scores are negative."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(codes), min(len(codes), TRAINING * nlist), replace=False, shuffle=False)
    points = reconstructions(codewords, codes[np.sort(chosen)])
    clustering = faiss.Kmeans(points.shape[1], nlist, niter=ROUNDS, seed=seed + 1, spherical=True,
                              min_points_per_centroid=1, max_points_per_centroid=TRAINING + 1)  # fmt: skip
    clustering.train(points)
    centres, means = faiss.IndexFlatIP(points.shape[1]), faiss.IndexFlatIP(points.shape[1])
    centres.add(clustering.centroids)
    lists = centres.search(points, 1)[1][:, 0]
    sums, sizes = np.zeros(clustering.centroids.shape), np.bincount(lists, minlength=nlist)[:, None]
    np.add.at(sums, lists, points)
    means.add(np.where(sizes > 0, sums / np.maximum(sizes, 1), clustering.centroids).astype(np.float32))
    return centres, means


def _refuse_none(codes: np.ndarray) -> None:
    if len(codes) == 0:
        raise InputError("there is no image to search: none could be indexed")


def _set_codewords(index: faiss.IndexPQ | faiss.IndexIVFPQ, codewords: np.ndarray) -> None:
    """Copy codewords, and zeros up to the next power of two, into an index, which is then trained."""
    M, K, d = codewords.shape
    whole = np.zeros((M, 2 ** bits_of(K), d), dtype=np.float32)
    whole[:, :K] = codewords
    faiss.copy_array_to_vector(whole.ravel(), index.pq.centroids)
    index.is_trained = True


# ---------------------------------------------------------------- codes as faiss has them


def bits_of(K: int) -> int:
    """Bits of a number of a code in faiss: 8, for which it is fastest, or what K > 256 codewords need."""
    return max(8, int(K - 1).bit_length())


def group_size(M: int, K: int) -> int:
    """How many codebooks are joined to one of at most 256 codewords: faiss is slow below 8 bits."""
    return max(g for g in range(1, 9) if M % g == 0 and (g == 1 or K**g <= 256))


def merged_codewords(codewords: np.ndarray) -> np.ndarray:
    """Codewords `[M / g, K^g, g d]`: all combinations of those of g codebooks. Their number is that of the first
    codebook, plus K times that of the second, and so on."""
    M, K, d = codewords.shape
    group = group_size(M, K)
    numbers = np.arange(K**group)
    books = codewords.reshape(M // group, group, K, d)
    joined = np.concatenate([books[:, i, numbers // K**i % K] for i in range(group)], axis=2)
    return np.ascontiguousarray(joined, dtype=np.float32)


def packed(codes: np.ndarray, K: int) -> np.ndarray:
    """Codes `[n, M]` of codebooks of K codewords as the bytes that faiss reads, `[n, bytes]` uint8."""
    n, M = codes.shape
    group = group_size(M, K)
    places = (K ** np.arange(group)).astype(np.int32)
    joined = (codes.reshape(n, M // group, group) * places).sum(axis=2, dtype=np.int32)
    bits = bits_of(K**group)
    return joined.astype(np.uint8) if bits == 8 else faiss.pack_bitstrings(joined, bits)


def reconstructions(codewords: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Codes `[n, M]` -> the codewords that they select, `[n, M d]` float32."""
    chosen = codewords[np.arange(len(codewords)), codes.astype(np.int64)]
    return np.ascontiguousarray(chosen.reshape(len(codes), -1), dtype=np.float32)


# ---------------------------------------------------------------- files


def write(index: faiss.Index, path: Path) -> None:
    """Write an index, atomically."""
    with atomic_write(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def open_mapped(path: Path) -> faiss.Index:
    """An index whose codes stay in their file, mapped into memory. Raises InputError if there is none in it."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        reason = "does not exist" if not path.exists() else "is not an index that faiss reads"
        raise InputError(f"{path} {reason}: index the images again") from error


# ---------------------------------------------------------------- searching


def search(index: faiss.Index, vectors: np.ndarray, k: int, nprobe: int = NPROBE) -> tuple[np.ndarray, np.ndarray]:
    """The k best images of each query, or all if there are fewer: scores float32 and positions int64, `[q, k]`, sorted
    by (-score, position). Which of several equal scores are the last ones is left to faiss.

    Args:
        nprobe: lists that are visited. If these hold fewer than k images, the rest of a row has position -1.
    """
    parameters = None
    if isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(nprobe=min(nprobe, index.nlist))
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    scores, positions = index.search(vectors, min(k, index.ntotal), params=parameters)
    return in_order(scores, positions)


def in_order(scores: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and positions `[q, k]`, each row sorted by (-score, position), with position -1 last."""
    order = np.lexsort((positions, -scores, positions < 0))
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)


def search_subset(
    codewords: np.ndarray, codes: np.ndarray, positions: np.ndarray, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the images at some ascending positions, exactly: scores and positions as of `search`."""
    M, _, d = codewords.shape
    k, chosen = min(k, len(positions)), codes[positions].astype(np.int64)
    found = []
    for segments in vectors.reshape(-1, M, d):
        tables = np.einsum("md,mkd->mk", segments, codewords)
        scores = np.zeros(len(positions), dtype=np.float32)
        for m in range(M):
            scores += tables[m, chosen[:, m]]
        best = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k]) if k else np.arange(0)
        best = best[np.argsort(-scores[best], kind="stable")[:k]]
        found.append((scores[best], positions[best]))
    scores, found_at = (np.stack(arrays) for arrays in zip(*found, strict=True))
    return scores, found_at


def recall(index: faiss.Index, exact: faiss.Index, vectors: np.ndarray) -> dict[str, object]:
    """The share of each query's k best scores that an index finds, for each k of `RECALL_AT`: a mean over queries. An
    image that scores as high as the k-th is as good as it."""
    measured = {"queries": len(vectors), "nprobe": min(NPROBE, getattr(index, "nlist", NPROBE))}
    for k in RECALL_AT:
        best, found = search(exact, vectors, k)[0], search(index, vectors, k)[0]
        rounding = 1e-6 * np.abs(best).max(initial=1)
        measured[f"at_{k}"] = float((found >= best[:, -1:] - rounding).mean()) if len(vectors) else None
    return measured
