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
                referee       judge that must find y_w' faithful to v', or None (pairs/texts.py)

Departures from the paper
- There a stronger VLM captions each image, and a language model writes y_w, y_l and y_w' from the claims of sampled
  responses that agree with the caption or do not. Here the text pair is given or ranked samples (pairs/rank.py), and
  y_w' is what `author` writes: the policy's best sample about v', or another model's response (--author).
- Where there is no such response, or it is y_w or y_l again, or not faithful (--clean-chosen), the next neighbour is
  tried; the paper does not say what it does.
"""

from collections import Counter

from judges.scores import Judge
from pairs.realign import Neighbours
from pairs.texts import Author, chosen_responses


def symmetric_pairs(pairs: list[dict], neighbours: Neighbours, author: Author,
                    source: dict | None = None, referee: Judge | None = None) -> tuple[list[dict], Counter]:
    """Add a similar image and its response to text pairs; `source` goes into the pair records."""
    near = {pair["id"]: neighbours(pair["image"]) for pair in pairs}
    made: dict[str, dict] = {}
    for rank in range(max(map(len, near.values()), default=0)):
        waiting = [pair for pair in pairs if pair["id"] not in made and rank < len(near[pair["id"]])]
        asked = [{**pair, "image": near[pair["id"]][rank][0]} for pair in waiting]
        answered, _ = chosen_responses(asked, author, referee)
        said = {record["id"]: record["chosen"] for record in answered}
        for pair in waiting:
            image, cosine = near[pair["id"]][rank]
            other = said.get(pair["id"])
            if other and other not in (pair["chosen"], pair["rejected"]):
                made[pair["id"]] = {
                    **pair, "rejected_image": image, "rejected_image_response": other,
                    "source": {"method": "symmpo", **(source or {}), "rank": rank + 1, "cosine": round(cosine, 4),
                               "text": pair.get("source")}}
    alone = sum(not found for found in near.values())
    dropped = Counter({"no other image is found": alone,
                       "no response to a similar image": len(pairs) - alone - len(made)})
    return [made[pair["id"]] for pair in pairs if pair["id"] in made], +dropped
