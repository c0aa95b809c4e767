"""Was this sentence a question? A small classifier on what the model remembers of it.

    pip install scikit-learn
    python examples/questions.py tinyshakespeare.txt [MODEL]

The sentences of a play without their last mark, as many that ended in ? as in a full stop. Logistic
regression learns from the first nine tenths of the text, from few sentences or from all, and is
asked about the last tenth, which the embedded model was not trained on either. Beside the
embeddings it is given how often each byte, and each pair of bytes, occurs in a sentence.
"""

import re
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from rwkv_cpp import RWKV
from rwkv_cpp.embedding import PARTS
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

warnings.simplefilter("ignore", ConvergenceWarning)

SENTENCE = re.compile(r"([A-Z][^.?!]{18,298}\w)([.?])(?= |$)")
HELD_OUT = 0.1
FEW = 100, 300, 1000  # sentences to learn from
DRAWS = 5  # of so few; their mean is shown


def sentences(text, draws):
    """(sentences, whether each was a question), in a drawn order."""
    found = []
    for speech in text.split("\n\n"):
        words = speech.split("\n")[1:]  # without the speaker
        found += SENTENCE.findall(" ".join(words))
    found = [found[i] for i in draws.permutation(len(found))]
    kinds = [[pair for pair in found if pair[1] == mark] for mark in "?."]
    both = [pair for pairs in zip(*kinds, strict=False) for pair in pairs]  # as many of each
    return [words for words, _ in both], np.array([mark == "?" for _, mark in both])


def counts(texts, keys_of):
    """(texts, keys): how often each of the keys that ten texts have occurs in a text."""
    found = [Counter(keys_of(text.encode())) for text in texts]
    common = Counter(key for each in found for key in each)
    keys = [key for key, count in common.items() if count >= 10]
    return np.array([[each[key] for key in keys] for each in found], np.float32)


def accuracy(rows, labels, learned, asked):
    """Of a classifier that learns from some rows; its penalty is chosen by them, too."""
    classifier = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)),
        {"logisticregression__C": [0.001, 0.01, 0.1]},
        cv=3,
    )
    classifier.fit(rows[learned], labels[learned])
    return classifier.score(rows[asked], labels[asked])


def main():
    draws = np.random.default_rng(0)
    text = Path(sys.argv[1]).read_text("utf-8")
    cut = len(text) - int(len(text) * HELD_OUT)
    known, known_labels = sentences(text[:cut], draws)
    asked, asked_labels = sentences(text[cut:], draws)
    texts, labels = known + asked, np.concatenate([known_labels, asked_labels])
    places = np.arange(len(texts))
    known, asked = places[: len(known)], places[len(known) :]
    print(f"{len(known)} sentences to learn from, {len(asked)} to ask about")

    with RWKV(sys.argv[2] if len(sys.argv) > 2 else None) as model:
        vectors = model.embed(texts).reshape(len(texts), model.n_layer, len(PARTS), model.n_embed)
    average = vectors[:, :, PARTS.index("aa/bb")].reshape(len(texts), -1)
    pairs = counts(texts, pairwise)
    for name, rows in {
        "bytes": counts(texts, iter),
        "pairs of bytes": pairs,
        "aa/bb of all layers": average,
        "all parts of all layers": vectors.reshape(len(texts), -1),
        "pairs and aa/bb": np.concatenate([pairs, average], axis=1),
    }.items():
        shown = []
        for n_learned in (n for n in FEW if n < len(known)):
            subsets = [draws.permutation(known)[:n_learned] for _ in range(DRAWS)]
            found = [accuracy(rows, labels, subset, asked) for subset in subsets]
            shown.append(f"{n_learned}: {np.mean(found):.3f}")
        shown.append(f"all: {accuracy(rows, labels, known, asked):.3f}")
        print(f"{name:<24}", "  ".join(shown), flush=True)
    for i, part in enumerate(PARTS):
        shown = [accuracy(rows, labels, known, asked) for rows in vectors[:, :, i].swapaxes(0, 1)]
        print(f"{part:<24}", "  ".join(f"layer {i}: {each:.3f}" for i, each in enumerate(shown)))


main()
