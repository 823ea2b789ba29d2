"""Beam search, or anything else `model.generate()` can do, over Fiddler's experts."""

from transformers import AutoTokenizer

import fiddler

model = fiddler.attach(fiddler.DEMO)
tokenizer = AutoTokenizer.from_pretrained(fiddler.DEMO)
inputs = tokenizer("And God said", return_tensors="pt")
beams = model.generate(**inputs, max_new_tokens=16, num_beams=4, num_return_sequences=2, do_sample=False)
for beam in beams:
    print(repr(tokenizer.decode(beam, skip_special_tokens=True)))
