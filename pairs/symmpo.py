"""SymMPO's pairs: a similar image and the response that is right for it.

Liu et al. 2025, "Mitigating Hallucination Through Theory-Consistent Symmetric Multimodal Preference Optimization",
NeurIPS 2025, arXiv 2506.11712. To a text pair (y_w, y_l | x, v) comes the image v' of the set that is most similar to v
(nearest by CLIP) and y_w', the response to x that is right for v'. Each of y_w and y_w' is then a hard negative under
the other's image: what they say differs in what the images show.

    symbol      argument      meaning
    y_w, y_l    pairs         pair records with `chosen` and `rejected`
    v'          neighbours    image -> k x (image, cosine), best first, from retrieval/index.py: the record's
                              `rejected_image`
    y_w'        author        records -> a response to each (pairs/texts.py): the record's `rejected_image_response`

Departures from the paper
- There a stronger VLM captions each image, and a language model writes y_w, y_l and y_w' from the claims of sampled
  responses that agree with the caption or do not. Here the text pair is given or ranked samples (pairs/rank.py), and
  y_w' is what `author` writes: the policy's best sample about v', or another model's response (--author).
- Where there is no such response, or it is y_w or y_l again, the next neighbour is tried; the paper does not say what
  it does.
"""

from collections import Counter

from pairs.realign import Neighbours
from pairs.texts import Author


def symmetric_pairs(pairs: list[dict], neighbours: Neighbours, author: Author,
                    source: dict | None = None) -> tuple[list[dict], Counter]:
    """Add a similar image and its response to text pairs; `source` goes into the pair records."""
    near = {pair["id"]: neighbours(pair["image"]) for pair in pairs}
    made: dict[str, dict] = {}
    for rank in range(max(map(len, near.values()), default=0)):
        waiting = [pair for pair in pairs if pair["id"] not in made and rank < len(near[pair["id"]])]
        others = [near[pair["id"]][rank] for pair in waiting]
        asked = [{**pair, "image": image} for pair, (image, _) in zip(waiting, others)]
        for pair, (image, cosine), reply in zip(waiting, others, author(asked), strict=True):
            if reply.text and reply.text not in (pair["chosen"], pair["rejected"]):
                made[pair["id"]] = {
                    **pair, "rejected_image": image, "rejected_image_response": reply.text,
                    "source": {"method": "symmpo", **(source or {}), "rank": rank + 1, "cosine": round(cosine, 4),
                               "text": pair.get("source")}}
    alone = sum(not found for found in near.values())
    dropped = Counter({"no other image is found": alone,
                       "no response to a similar image": len(pairs) - alone - len(made)})
    return [made[pair["id"]] for pair in pairs if pair["id"] in made], +dropped
