"""What is known about pairs that were made: how many, why others were dropped, and of scenes how wrong they are."""

from collections import Counter

from data import scenes
from data.images import is_scene
from judges.scene import judge_scene


def report_on(method: str, records: list[dict], made: list[dict], dropped: Counter) -> dict:
    """What `make_pairs` says about its pairs."""
    report = {"method": method, "images": len(records), "pairs": len(made), "dropped": dict(dropped)}
    if contexts := [pair["context"] for pair in made if pair.get("context") is not None]:
        report["contexts"] = {"images": len({str(pair["image"]) for pair in made}),
                              "words": sum(len(context.split()) for context in contexts) / len(contexts)}
    if made and all(is_scene(pair["image"]) for pair in made):
        report["hallucinating"] = {key: sum(judge_scene(pair, [pair[key]])[0].wrong > 0 for pair in made) / len(made)
                                   for key in ("chosen", "rejected")}
        if drawn := [pair for pair in made if pair["rejected_image"] and is_scene(pair["rejected_image"])]:
            report["rejected_image"] = _rejected_images(drawn)
    return report


def _rejected_images(pairs: list[dict]) -> dict:
    """Shares of rejected scenes: `contradicts`, where `chosen` mentions more absent objects than in the scene
    it describes, and `gone`, where the object that was to be removed is."""
    wrong = [[judge_scene({**pair, "image": pair[key]}, [pair["chosen"]])[0].wrong
              for key in ("image", "rejected_image")] for pair in pairs]
    shares = {"contradicts": sum(other > own for own, other in wrong) / len(pairs)}
    removed = [(pair["rejected_image"], candidate["removed"]) for pair in pairs
               for candidate in pair["source"].get("candidates", ()) if candidate["image"] == pair["rejected_image"]]
    if removed:
        gone = [label not in scenes.objects_present(*scenes.parse_reference(image)) for image, label in removed]
        shares["gone"] = sum(gone) / len(gone)
    return shares


def summary(report: dict, seconds: float) -> str:
    """What the report says, for people."""
    lines = [f"{report['pairs']} pairs of {report['images']} images in {seconds:.0f} s"]
    lines += [f"  {count:5d} dropped: {reason}" for reason, count in sorted(report["dropped"].items())]
    if contexts := report.get("contexts"):
        lines.append(f"  {contexts['images']:5d} images gave them; {contexts['words']:.1f} words of context on average")
    lines += [f"  {100 * share:5.1f} % of the {key} answers mention an absent object"
              for key, share in report.get("hallucinating", {}).items()]
    says = {"contradicts": "of the rejected images lack an object that the chosen response mentions",
            "gone": "of the removed objects are gone"}
    lines += [f"  {100 * share:5.1f} % {says[key]}" for key, share in report.get("rejected_image", {}).items()]
    lines += [f"  {count:5d} neighbours passed over as {kind} of the image or of a nearer one"
              for kind, count in report.get("same_image", {}).items() if count]
    if "recall" in report:
        lines.append(f"  {100 * report['recall']:5.1f} % of the nearest images are found (recall)")
    return "\n".join(lines)
