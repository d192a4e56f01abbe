import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { BRAND, DATA_URL, MODEL, QUESTION, SCHEMA, SIZES, TEXT, URL, check, fails, picked, run } from "./common.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });
const parts = [
  { type: "image_url", image_url: { url: DATA_URL } },
  { type: "text", text: QUESTION },
];
const tool = { type: "function", function: { name: "pick_size", parameters: SCHEMA } };

function create(content, more = {}) {
  return client.chat.completions.create({
    model: MODEL,
    messages: [{ role: "user", content }],
    max_tokens: 64,
    ...more,
  });
}

await run("openai", {
  text: async () => check((await create(QUESTION)).choices[0].message.content, TEXT),
  picture: async () => {
    check((await create(parts)).choices[0].message.content, BRAND);
    const content = [
      { type: "input_image", image_url: DATA_URL, detail: "auto" },
      { type: "input_text", text: QUESTION },
    ];
    check((await client.responses.create({ model: MODEL, input: [{ role: "user", content }] })).output_text, BRAND);
  },
  stream: async () => {
    let text = "";
    for await (const chunk of await create(parts, { stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
    check(text, BRAND);
  },
  tools: async () => {
    const chosen = { type: "function", function: { name: "pick_size" } };
    const told = await create("Pick.", { tools: [tool], tool_choice: chosen });
    picked(JSON.parse(told.choices[0].message.tool_calls[0].function.arguments));
  },
  structured: async () => {
    const told = await client.chat.completions.parse({
      model: MODEL,
      messages: [{ role: "user", content: "Pick." }],
      response_format: zodResponseFormat(z.object({ size: z.enum(SIZES) }), "pick"),
    });
    picked(told.choices[0].message.parsed);
  },
  error: () => fails(() => create("x", { model: "nope" }), 404),
});
