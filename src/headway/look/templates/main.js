// The rest of the free-form numbers, and the first choice of a head.

section("more", (body) => {
  for (const [heading, record, drawn] of [["Sinks", DATA.sinks, ["positions", "sentence"]], ["Roles", DATA.roles, ["sentence"]]]) {
    if (Object.keys(record).length) {
      const sentence = record.sentence ? el("p", { class: "about" }, prose(record.sentence)) : null;
      body.append(el("div", { class: "card wide" }, el("h3", {}, heading), sentence, facts(record, drawn)));
    }
  }
});

const first = DATA.maps[0] ?? { layer: 0, head: 0 };
if (DATA.grid.layers && DATA.grid.heads) choose(first.layer, first.head);
