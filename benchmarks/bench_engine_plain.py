"""A typical plain server over transformers: FastAPI, the processor, `generate()` in a thread; no lock, no batching.

Run by bench_engine.py in transformers' environment: `python bench_engine_plain.py CHECKPOINT PORT DTYPE`.
"""

import base64
import io
import json
import sys
import threading

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

folder, port, dtype = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
processor = AutoProcessor.from_pretrained(folder)
app = FastAPI()


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/v1/models")
def models() -> dict[str, list[dict[str, str]]]:
    return {"data": [{"id": folder}]}


@app.post("/v1/chat/completions")
async def answer(request: Request) -> StreamingResponse:
    payload = await request.json()
    content, images = [], []
    for part in payload["messages"][0]["content"]:
        if part["type"] == "image_url":
            data = part["image_url"]["url"].partition(",")[2]
            images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
            content.append({"type": "image"})
        else:
            content.append(part)

    def events():
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=images, return_tensors="pt")
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=600)
        limit = payload["max_tokens"]
        options = dict(**inputs, streamer=streamer, max_new_tokens=limit, min_new_tokens=limit, do_sample=False)
        threading.Thread(target=model.generate, kwargs=options, daemon=True).start()
        for piece in streamer:
            if piece:
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': piece}}]})}\n\n"
        usage = {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": limit}
        yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'length'}]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
