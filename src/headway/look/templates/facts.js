// Free-form results as tables: what a dictionary holds is shown, whatever its keys.

const LONGEST_TABLE = 60;
const LONGEST_LIST = 24;

const title = (key) => { const text = prose(key).replace(/_/g, " "); return text.charAt(0).toUpperCase() + text.slice(1); };
const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isScalar = (value) => value === null || typeof value !== "object";

function scalar(value) {
  if (typeof value === "number") return number(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return value === null ? "–" : prose(value);
}

// Rows of records as one table; columns in the order in which the rows first name them.
function recordTable(records, caption) {
  const columns = [...new Set(records.flatMap(Object.keys))];
  const rows = records.slice(0, LONGEST_TABLE).map((record) => columns.map((column) => {
    const value = record[column];
    if (value === undefined) return "";
    if (typeof value === "number") return value;
    return isScalar(value) ? scalar(value) : listText(value);
  }));
  const parts = [table(columns.map(title), rows, caption)];
  if (records.length > rows.length) parts.push(el("p", { class: "quiet" }, `${records.length - rows.length} more rows are in the JSON.`));
  return el("div", {}, ...parts);
}

function listText(value) {
  if (isRecord(value)) return Object.entries(value).map(([key, inner]) => `${prose(key)}: ${isScalar(inner) ? scalar(inner) : "…"}`).join(", ");
  const items = value.slice(0, LONGEST_LIST).map((item) => (isScalar(item) ? scalar(item) : listText(item)));
  return items.join(", ") + (value.length > LONGEST_LIST ? `, … (${value.length} in all)` : "");
}

// One number per layer under every key: curves rather than rows of numbers.
function isCurves(record) {
  const lists = Object.values(record);
  const isCurve = (list) => Array.isArray(list) && list.length === DATA.grid.layers && list.every((value) => value === null || typeof value === "number");
  return DATA.grid.layers > 2 && lists.length > 0 && lists.every(isCurve);
}

function curves(record) {
  const layers = Array.from({ length: DATA.grid.layers }, (_, i) => i);
  const members = Object.entries(record).map(([key, values]) => ({ label: title(key), layers, values }));
  const node = el("div", { role: "img", "aria-label": `By layer: ${members.map(({ label }) => label).join(", ")}` });
  plot(node, () => linePlot(members, spansDecades(members)));
  return node;
}

// A dictionary as facts: scalars and lists in one table, lists of records and inner dictionaries under their own headings.
function facts(record, skip = []) {
  const rows = [];
  const blocks = [];
  for (const [key, value] of Object.entries(record)) {
    if (skip.includes(key)) continue;
    if (isScalar(value)) rows.push([title(key), scalar(value)]);
    else if (Array.isArray(value) && value.length && value.every(isRecord)) blocks.push(block(key, recordTable(value)));
    else if (Array.isArray(value)) rows.push([title(key), value.length ? listText(value) : "none"]);
    else if (isCurves(value)) blocks.push(block(key, curves(value)));
    else if (Object.keys(value).length) blocks.push(block(key, facts(value)));
  }
  const list = rows.length
    ? el("table", { class: "facts" }, el("tbody", {}, ...rows.map(([name, text]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { dir: "auto" }, text)))))
    : null;
  return el("div", { class: "free" }, list, ...blocks);
}

// Records that carry a layer and else only numbers, as curves by layer with the table folded away; null when they do not.
function layerCurves(records) {
  const columns = Object.keys(records[0]).filter((column) => column !== "layer");
  const isPlain = (row) => Number.isInteger(row.layer) && columns.every((column) => row[column] === null || typeof row[column] === "number");
  if (records.length < 3 || !columns.length || !records.every(isPlain)) return null;
  const members = columns.map((column) => ({ label: title(column), layers: records.map((row) => row.layer), values: records.map((row) => row[column]) }));
  const node = el("div", { role: "img", "aria-label": `By layer: ${columns.map(title).join(", ")}; the table below holds the numbers` });
  plot(node, () => linePlot(members, spansDecades(members)));
  return el("div", {}, node, el("details", {}, el("summary", {}, "As a table"), recordTable(records)));
}

const block = (key, body) => el("div", { class: "block" }, el("h3", {}, title(key)), body);

// What a section did not draw itself, folded away.
function leftovers(body, record, drawn) {
  const isEmpty = (value) => value === null || (typeof value === "object" && !Object.keys(value).length);
  if (Object.entries(record).some(([key, value]) => !drawn.includes(key) && !isEmpty(value))) {
    body.append(el("details", { ontoggle: () => dispatchEvent(new Event("resize")) }, el("summary", {}, "More numbers"), facts(record, drawn)));
  }
}
