// The head inspector: one head's map, its detail windows at full resolution, its strongest pairs and keys.

const CONTEXT = 6;

section("inspector", (body) => {
  const mapName = (map) => [headName(map.layer, map.head), ...wordsOf(map.layer, map.head).map(prose)].join(" · ");
  const select = el("select", { id: "map-pick", onchange: () => { open(DATA.maps[Number(select.value)]); choose(map.layer, map.head); } },
    ...DATA.maps.map((item, i) => el("option", { value: i }, mapName(item))));
  const note = el("p", { class: "about", "aria-live": "polite" });
  const whole = el("div", { class: "map", id: "map-whole" });
  const detail = el("div", { class: "map", id: "map-detail" });
  const wholeNote = el("p", { class: "about" });
  const detailNote = el("p", { class: "about" });
  const chips = el("div", { class: "chips", role: "group", "aria-label": "Detail windows" });
  const context = el("div", { id: "map-context", class: "context" });
  const key = el("div", { class: "strip-key" });
  const pairs = el("div", {});
  const keys = el("div", {});
  let map = DATA.maps[0];
  let active = 0;

  body.append(
    el("p", { class: "lead" }, "Each row is a query, each column a key. Colour is the square root of the weight, so weak attention stays visible; a cell of the whole map shows the strongest weight inside it."),
    el("div", { class: "controls" }, el("label", { for: "map-pick" }, "Head"), select, key), note,
    el("div", { class: "columns" },
      el("div", { class: "card" }, el("h3", {}, "Whole map"), wholeNote, whole),
      el("div", { class: "card" }, el("h3", {}, "Detail"), detailNote, detail, chips)),
    context,
    el("div", { class: "columns" }, el("div", { class: "card" }, pairs), el("div", { class: "card" }, keys)));

  const weight = (byte) => (byte / 255) ** 2;

  // Draws a square of bytes and lets mouse and arrow keys read it. `read(row, column)` describes a cell.
  function square(node, side, data, name, cellOf) {
    const canvas = el("canvas", { width: side, height: side, tabindex: "0", role: "img", "aria-label": `${name}; arrow keys move, the text below the maps tells query, key and weight` });
    const cross = el("div", { class: "cross", hidden: true });
    const paint = () => {
      const table = palette(ramps().sequential);
      const pen = canvas.getContext("2d");
      const image = pen.createImageData(side, side);
      data.forEach((byte, i) => image.data.set([...table[byte], 255], 4 * i));
      pen.putImageData(image, 0, 0);
    };
    paint();
    const stage = el("div", { class: "stage" }, canvas, cross);
    let cursor = null;
    const mark = (row, column) => {
      cursor = [row, column];
      cross.hidden = false;
      cross.style.cssText = `left:${(100 * column) / side}%;top:${(100 * row) / side}%;width:${100 / side}%;height:${100 / side}%`;
      const cell = cellOf(row, column, data[row * side + column]);
      read(cell);
      return cell;
    };
    stage.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      const place = (offset, length) => Math.min(side - 1, Math.max(0, Math.floor((offset / length) * side)));
      const cell = mark(place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width));
      showTip(event, tipLines(cell));
    });
    stage.addEventListener("mouseleave", () => { hideTip(); cross.hidden = true; });
    canvas.addEventListener("keydown", (event) => {
      const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
      if (!down && !right) return;
      event.preventDefault();
      const [row, column] = cursor ?? [0, 0];
      mark(Math.min(side - 1, Math.max(0, row + down)), Math.min(side - 1, Math.max(0, column + right)));
    });
    node.replaceChildren(stage);
    return { stage, paint };
  }

  // A cell: first and last query and key (the same at full resolution), and the strongest weight inside.
  const single = (cell) => cell.queries[0] === cell.queries[1] && cell.keys[0] === cell.keys[1];
  const span = ([first, last]) => (first === last ? number(first) : `${number(first)} to ${number(last)}`);

  function tipLines(cell) {
    if (single(cell)) {
      return [`weight ${number(cell.weight, false)}`, el("span", {}, `query ${number(cell.queries[0])} `, tokenChip(cell.queries[0])), el("span", {}, `key ${number(cell.keys[0])} `, tokenChip(cell.keys[0]))];
    }
    return [`strongest weight ${number(cell.weight, false)}`, el("span", {}, `queries ${span(cell.queries)}, from `, tokenChip(cell.queries[0])), el("span", {}, `keys ${span(cell.keys)}, from `, tokenChip(cell.keys[0]))];
  }

  function around([first, last]) {
    const text = (from, to) => { const words = []; for (let i = Math.max(0, from); i <= Math.min(DATA.tokens.length - 1, to); i++) words.push(el("bdi", {}, visible(DATA.tokens[i]))); return words; };
    const short = Math.min(last, first + 15);
    return el("span", { class: "text" }, ...text(first - CONTEXT, first - 1), el("mark", {}, ...text(first, short)), ...(short < last ? ["…"] : text(last + 1, last + CONTEXT)));
  }

  function read(cell) {
    context.replaceChildren(
      el("div", {}, el("b", {}, `Query ${span(cell.queries)}`), around(cell.queries)),
      el("div", {}, el("b", {}, `Key ${span(cell.keys)}`), around(cell.keys)),
      el("div", {}, el("b", {}, single(cell) ? "Weight" : "Strongest weight"), el("span", {}, number(cell.weight, false))));
  }

  let squares = [];

  function open(item) {
    map = item;
    active = 0;
    select.value = DATA.maps.indexOf(map);
    note.textContent = "";
    const data = bytes(map.pixels);
    const range = (index, total) => [Math.floor((index * total) / map.side), Math.max(Math.floor((index * total) / map.side), Math.ceil(((index + 1) * total) / map.side) - 1)];
    wholeNote.textContent = map.side >= Math.max(map.rows, map.columns)
      ? `${number(map.rows)} queries × ${number(map.columns)} keys, every weight drawn.`
      : `${number(map.rows)} queries × ${number(map.columns)} keys on ${map.side} × ${map.side} cells; frames open details.`;
    const drawn = square(whole, map.side, data, `Attention map of ${mapName(map)}`,
      (row, column, byte) => ({ queries: range(row, map.rows), keys: range(column, map.columns), weight: weight(byte) }));
    map.windows.forEach((item_, i) => drawn.stage.append(el("button", {
      type: "button", class: "frame", "data-window": i, "aria-label": `Detail: ${windowName(item_)}`, onclick: () => openWindow(i),
      style: `left:${(100 * item_.column) / map.columns}%;top:${(100 * item_.row) / map.rows}%;width:${(100 * item_.size) / map.columns}%;height:${(100 * item_.size) / map.rows}%`,
    })));
    ticks(whole, 0, map.rows, 0, map.columns);
    squares = [drawn];
    chips.replaceChildren(...map.windows.map((item_, i) => el("button", { type: "button", class: "chip", "data-window": i, onclick: () => openWindow(i) }, windowName(item_))));
    chips.hidden = map.windows.length < 2;
    listPairs();
    listKeys();
    if (map.pairs.length) showPair(...map.pairs[0]);
    else context.replaceChildren(el("span", { class: "quiet" }, "Hover a map, or focus it and use the arrow keys, to read the tokens here."));
    if (map.windows.length) openWindow(active);
    else {
      detail.replaceChildren();
      detailNote.textContent = "No detail windows were kept for this head.";
    }
  }

  const windowName = (item) => `queries ${item.row} to ${item.row + item.size - 1}, keys ${item.column} to ${item.column + item.size - 1}`;

  function openWindow(index) {
    active = index;
    const item = map.windows[index];
    detailNote.textContent = `Every weight of ${windowName(item)}.`;
    const drawn = square(detail, item.size, bytes(item.pixels), `Detail of ${mapName(map)}: ${windowName(item)}`,
      (row, column, byte) => ({ queries: [item.row + row, item.row + row], keys: [item.column + column, item.column + column], weight: weight(byte) }));
    ticks(detail, item.row, item.size, item.column, item.size);
    squares = [squares[0], drawn];
    for (const button of body.querySelectorAll("[data-window]")) button.setAttribute("aria-pressed", String(Number(button.dataset.window) === active));
  }

  // Positions along the left and lower edge.
  function ticks(node, row, rows, column, columns) {
    const step = (count) => tickStep(count, 5);
    const marks = (first, count, side) => {
      const out = [];
      for (let i = Math.ceil(first / step(count)) * step(count); i < first + count; i += step(count)) {
        out.push(el("span", { style: `${side}:${(100 * (i - first + 0.5)) / count}%` }, number(i)));
      }
      return out;
    };
    node.append(el("div", { class: "ticks left", "aria-hidden": "true" }, ...marks(row, rows, "top")), el("div", { class: "ticks below", "aria-hidden": "true" }, ...marks(column, columns, "left")),
      el("div", { class: "axis", "aria-hidden": "true" }, "query ↓  key →"));
  }

  // Opens the window that holds a pair, when one does, and reads the pair.
  function showPair(query, keyPosition, value) {
    const index = map.windows.findIndex((item) => query >= item.row && query < item.row + item.size && keyPosition >= item.column && keyPosition < item.column + item.size);
    if (index >= 0) openWindow(index);
    read({ queries: [query, query], keys: [keyPosition, keyPosition], weight: value });
  }

  function listPairs() {
    const rows = map.pairs.map(([query, keyPosition, value]) => [
      el("button", { type: "button", class: "link", onclick: () => showPair(query, keyPosition, value) }, ...tokenAt(query)),
      el("span", {}, ...tokenAt(keyPosition)), query - keyPosition, value,
    ]);
    pairs.replaceChildren(el("h3", {}, "Strongest pairs"), rows.length
      ? table(["query", "key", "distance", "weight"], rows)
      : el("p", { class: "quiet" }, "None were kept."));
    pairs.querySelector("h3").after(el("p", { class: "about" }, "Away from sinks and from the diagonal."));
  }

  function listKeys() {
    const most = Math.max(...map.keys.map(([, value]) => value), 0) || 1;
    keys.replaceChildren(el("h3", {}, "Strongest keys"), el("p", { class: "about" }, "Mass received per query that can see the key."), map.keys.length
      ? el("ol", { class: "bars" }, ...map.keys.map(([position, value]) => el("li", {}, el("span", {}, ...tokenAt(position)),
        el("span", { class: "bar", "aria-hidden": "true" }, el("span", { style: `width:${(100 * value) / most}%` })), el("span", { class: "number" }, number(value, false)), el("span", { class: "word" }))))
      : el("p", { class: "quiet" }, "None were kept."));
  }

  const paintKey = () => key.replaceChildren(el("span", {}, "0"), el("i", { class: "ramp", style: `background:${gradient(ramps().sequential)}` }), el("span", {}, "1 (square root)"));

  chosen.listeners.push((layer, head) => {
    const item = DATA.maps.find((other) => other.layer === layer && other.head === head);
    if (item === map) return;
    if (item) open(item);
    else note.textContent = `${headName(layer, head)} has no map in this report; shown is ${headName(map.layer, map.head)}.`;
  });
  painters.push(() => { paintKey(); squares.forEach((drawn) => drawn.paint()); });
  paintKey();
  open(map);
});
