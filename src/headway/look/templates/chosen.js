// What the sections of a look share: the chosen head, tokens as chips, and packed numbers.

// The chosen head, and who wants to know. A head is chosen in the grids, in lists and in the inspector.
const chosen = { layer: 0, head: 0, listeners: [] };

function choose(layer, head) {
  chosen.layer = layer;
  chosen.head = head;
  for (const listener of chosen.listeners) listener(layer, head);
}

const headName = (layer, head) => `Layer ${layer}, head ${head}`;
const wordsOf = (layer, head) => DATA.labels.map((item) => item.values[layer]?.[head]).filter(Boolean);

// A list's entry for a token: its position, then the token, which may be cut.
const tokenAt = (position) => [`${number(position)} `, tokenChip(position)];

const tokenChip = (position) => el("code", { class: "token", dir: "auto" }, shown(DATA.tokens[position] ?? "?"));

// The numbers that report.pack_log packed, as one flat array.
function unpackLog(packed) {
  const codes = new Uint16Array(bytes(packed.codes).buffer);
  const step = Math.log(packed.high / packed.low) / 65533;
  return Float64Array.from(codes, (code) => (code < 2 ? (code === 1 ? 0 : NaN) : packed.low * Math.exp((code - 2) * step)));
}
