"""A service around a cascade: `pip install fastapi uvicorn python-multipart`, then `uvicorn examples.service:app`."""

import os

from fastapi import FastAPI, UploadFile

from clcnet import Cascade

app, cascade = FastAPI(), Cascade.from_policy(os.environ.get("CLCNET_POLICY", "weights/cascade.json"))


@app.post("/classify")
def classify(files: list[UploadFile]) -> list[dict[str, object]]:  # no `async`: FastAPI calls it in threads
    found = cascade([file.file.read() for file in files])
    answers = zip(found.names, found.confidences.tolist(), found.answered_by.tolist(), strict=True)
    return [
        {"error": found.errors[place]} if place in found.errors else {"class": name, "confidence": sure, "model": model}
        for place, (name, sure, model) in enumerate(answers)
    ]
