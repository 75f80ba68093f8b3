"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  // Everything that a model wrote goes through here: text nodes and attributes, never markup.
  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== false) made.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  };
  const classes = (...names) => names.filter(Boolean).join(" ") || undefined;
  const unpack = async (script) => {
    const bytes = Uint8Array.from(atob(script.textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  };
  const number = (value, decimals = 3) => (value === null || value === undefined ? "–" : value.toFixed(decimals).replace("-", "−"));

  const { runs, environments, tasks, parses, columns } = await unpack($("index"));
  const count = columns.step.length;
  const chunks = [...document.querySelectorAll("script.texts")];
  const firsts = chunks.map((chunk) => Number(chunk.dataset.first));
  const opened = new Map();
  const chunkOf = (index) => {
    let [low, high] = [0, firsts.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (firsts[middle] <= index) low = middle; else high = middle;
    }
    return low;
  };
  // The newest chunks stay unpacked.
  const texts = (chunk) => {
    const kept = opened.get(chunk) ?? unpack(chunks[chunk]);
    opened.delete(chunk);
    opened.set(chunk, kept);
    if (opened.size > 16) opened.delete(opened.keys().next().value);
    return kept;
  };
  const textOf = async (index) => {
    const chunk = chunkOf(index);
    const { prompts, rows } = await texts(chunk);
    const [prompt, completion, details] = rows[index - firsts[chunk]];
    return { prompt: prompts[prompt], completion, details };
  };

  const SPLITS = ["training", "held out"];
  const parse = (index) => parses[columns.parse[index]] ?? "error";
  const correct = (index) => ({ 1: "right", 0: "wrong" })[columns.correct[index]] ?? "–";
  const when = (index) => (columns.split[index] ? `held out, after ${columns.step[index]} steps` : `training, step ${columns.step[index]}`);
  const distinct = (values) => [...new Set(values)];

  // --- the table of rollouts
  const FILTERS = [
    { key: "run", title: "Run", options: runs.map((name, value) => [value, name]), of: (i) => columns.run[i] },
    { key: "environment", title: "Environment", options: environments.map((name, value) => [value, name]), of: (i) => columns.environment[i] },
    { key: "split", title: "Split", options: SPLITS.map((name, value) => [value, name]), of: (i) => columns.split[i] },
    { key: "step", title: "Step", options: distinct(columns.step).sort((a, b) => a - b).map((step) => [step, String(step)]), of: (i) => columns.step[i] },
    { key: "parse", title: "Read as", options: distinct(Array.from({ length: count }, (_, i) => parse(i))).sort().map((name) => [name, name]), of: parse },
    { key: "correct", title: "Answer", options: ["right", "wrong", "–"].map((name) => [name, name === "–" ? "not known" : name]), of: correct },
  ];
  const COLUMNS = [
    { key: "step", title: "When", text: when },
    { key: "task", title: "Question", text: (i) => tasks[columns.task[i]] },
    { key: "group", title: "Group", wide: true, text: (i) => columns.group[i] },
    { key: "rollout", title: "#", wide: true, text: (i) => columns.rollout[i] },
    { key: "parse", title: "Read as", wide: true, text: parse },
    { key: "correct", title: "Answer", text: correct },
    { key: "confidence", title: "Confidence", sorts: true, text: (i) => number(columns.confidence[i], 2) },
    { key: "reward", title: "Reward", sorts: true, text: (i) => number(columns.reward[i]) },
    { key: "advantage", title: "Advantage", sorts: true, wide: true, text: (i) => number(columns.advantage[i]) },
    { key: "tokens", title: "Tokens", sorts: true, wide: true, text: (i) => columns.tokens[i] },
  ];
  const PAGE = 25;
  const state = { filters: {}, words: "", sort: null, descending: true, page: 0, chosen: null };
  let shown = [];
  let matching = null;

  const select = (title, options, change, empty) => {
    const choice = element("select", { onchange: (event) => change(event.target.value) });
    if (empty) choice.append(element("option", { value: "" }, empty));
    for (const [value, name] of options) choice.append(element("option", { value }, name));
    return element("label", {}, title, choice);
  };
  for (const filter of FILTERS) {
    if (filter.options.length < 2) continue;
    $("filters").append(select(filter.title, filter.options, (value) => {
      if (value === "") delete state.filters[filter.key]; else state.filters[filter.key] = value;
      state.page = 0;
      update();
    }, "all"));
  }
  const search = element("input", { type: "search", placeholder: "words in completions" });
  $("filters").append(
    element("label", {}, "Search", search),
    select("Sort by", COLUMNS.filter((column) => column.sorts).flatMap(({ key, title }) => [[`${key} down`, `${title}, highest first`], [`${key} up`, `${title}, lowest first`]]), (value) => {
      const [key, direction] = value.split(" ");
      sortBy(key || null, direction === "down");
    }, "time"),
  );
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("change", async () => {
    state.words = search.value.trim().toLowerCase();
    state.page = 0;
    await find();
    update();
  });

  // Which rollouts hold the words: every chunk is unpacked once, and none is kept.
  const find = async () => {
    const words = state.words;
    if (!words) return void (matching = null);
    const found = new Set();
    for (let chunk = 0; chunk < chunks.length; chunk++) {
      if (chunk % 16 === 0) $("count").textContent = `searching, ${Math.round((100 * chunk) / chunks.length)}%`;
      const { rows } = await unpack(chunks[chunk]);
      if (state.words !== words) return;
      rows.forEach(([, completion], row) => completion.toLowerCase().includes(words) && found.add(firsts[chunk] + row));
    }
    matching = found;
  };

  const sortBy = (key, descending) => {
    [state.sort, state.descending, state.page] = [key, descending, 0];
    $("filters").querySelector("label:last-child select").value = key ? `${key} ${descending ? "down" : "up"}` : "";
    update();
  };
  for (const { key, title, sorts, wide } of COLUMNS) {
    const head = sorts ? element("button", { type: "button", onclick: () => sortBy(key, state.sort === key ? !state.descending : true) }, title) : title;
    $("heads").append(element("th", { scope: "col", "data-key": key, class: classes(sorts && "number", wide && "wide") }, head));
  }

  const update = () => {
    const active = FILTERS.filter(({ key }) => key in state.filters);
    shown = [];
    for (let index = 0; index < count; index++) {
      if (active.every(({ key, of }) => String(of(index)) === state.filters[key]) && (!matching || matching.has(index))) shown.push(index);
    }
    if (state.sort) {
      const values = columns[state.sort];
      const sign = state.descending ? -1 : 1;
      // What is missing comes last either way.
      const missing = (index) => (values[index] === null ? 1 : 0);
      shown.sort((a, b) => missing(a) - missing(b) || sign * (values[a] - values[b]) || a - b);
    }
    for (const head of $("heads").children) {
      const sorted = head.dataset.key === state.sort;
      if (sorted) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending"); else head.removeAttribute("aria-sort");
      const button = head.querySelector("button");
      if (button) button.textContent = button.textContent.replace(/ [▲▼]$/, "") + (sorted ? (state.descending ? " ▼" : " ▲") : "");
    }
    list();
  };
  const list = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    $("count").textContent = `${shown.length.toLocaleString("en")} of ${count.toLocaleString("en")} rollouts`;
    $("place").textContent = `page ${(state.page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    [$("previous").disabled, $("next").disabled] = [state.page === 0, state.page + 1 === pages];
    $("rows").replaceChildren(...shown.slice(state.page * PAGE, (state.page + 1) * PAGE).map((index) =>
      element("tr", { "aria-current": index === state.chosen },
        ...COLUMNS.map(({ key, text, sorts, wide }) => {
          const value = String(text(index));
          const inner = key === "task" ? element("button", { type: "button", onclick: () => choose(index) }, value) : value;
          const tone = key === "correct" ? { right: "good", wrong: "bad" }[value] : undefined;
          return element("td", { class: classes(sorts && "number", wide && "wide", tone) }, inner);
        }))));
  };
  const turn = (pages) => { state.page += pages; list(); };
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));

  // --- groups
  const sameGroup = (a, b) => ["run", "split", "step", "environment", "group"].every((key) => columns[key][a] === columns[key][b]);
  const groupOf = (index) => {
    let [first, last] = [index, index];
    while (first > 0 && sameGroup(first - 1, index)) first--;
    while (last + 1 < count && sameGroup(last + 1, index)) last++;
    return Array.from({ length: last - first + 1 }, (_, offset) => first + offset);
  };
  const card = async (index) => {
    const { completion, details } = await textOf(index);
    const facts = [
      ["reward", number(columns.reward[index])], ["advantage", number(columns.advantage[index])],
      ["confidence", number(columns.confidence[index], 2)], ["answer", correct(index)], ["read as", parse(index)],
      ["tokens", `${columns.tokens[index]}${columns.finish[index] ? " (cut)" : ""}`],
    ].filter(([, value]) => value !== "–");
    const more = Object.entries(details).filter(([, value]) => typeof value === "number" || (value && Object.keys(value).length));
    return element("div", { class: "card", "aria-current": index === state.chosen },
      element("h4", {}, `Rollout ${columns.rollout[index]}`),
      element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", { class: { right: "good", wrong: "bad" }[value] }, value)])),
      element("pre", {}, completion === "" ? "(nothing)" : completion),
      element("details", {}, element("summary", {}, "more"), element("pre", {}, more.map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join("\n"))));
  };
  const promptOf = async (index) => {
    const { prompt } = await textOf(index);
    if (!prompt.length) return null;
    return element("details", { open: true }, element("summary", {}, "Prompt"),
      element("div", { class: "prompt" }, ...prompt.flatMap(({ role, content }) => [element("b", {}, role), element("pre", {}, content)])));
  };
  const choose = async (index) => {
    state.chosen = index;
    list();
    const group = groupOf(index);
    const step = (by) => {
      const next = by < 0 ? group[0] - 1 : group[group.length - 1] + 1;
      return element("button", { type: "button", disabled: next < 0 || next >= count, onclick: () => choose(by < 0 ? groupOf(next)[0] : next) }, by < 0 ? "Previous group" : "Next group");
    };
    const cards = element("div", { class: "cards", tabindex: "0", role: "group", "aria-label": "rollouts of the group" }, ...(await Promise.all(group.map(card))));
    const prompt = await promptOf(index);
    if (state.chosen !== index) return;
    $("group").replaceChildren(
      ...[element("h3", {}, `${tasks[columns.task[index]]} – ${when(index)}, group ${columns.group[index]}${runs.length > 1 ? `, ${runs[columns.run[index]]}` : ""}`),
        element("div", { class: "pager" }, step(-1), step(1), element("span", { class: "quiet" }, `${group.length} rollouts of the same question`)),
        prompt, cards].filter(Boolean));
    $("group").focus({ preventScroll: true });
    $("group").scrollIntoView({ block: "nearest" });
    cards.querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  };

  // --- the same question, first and last
  const questions = new Map();
  for (let index = 0; index < count; index++) {
    const key = `${columns.run[index]} ${columns.environment[index]} ${columns.task[index]}`;
    if (!questions.has(key)) questions.set(key, []);
    questions.get(key).push(index);
  }
  const mean = (rollouts) => {
    const known = rollouts.map((index) => columns.reward[index]).filter((reward) => reward !== null);
    return known.length ? known.reduce((sum, reward) => sum + reward, 0) / known.length : null;
  };
  const pairs = [];
  for (const rollouts of questions.values()) {
    const ends = [rollouts[0], rollouts[rollouts.length - 1]];
    if (columns.step[ends[0]] === columns.step[ends[1]] && columns.split[ends[0]] === columns.split[ends[1]]) continue;
    const [first, last] = ends.map(groupOf);
    const [before, after] = [first, last].map(mean);
    pairs.push({ first, last, gain: before === null || after === null ? null : after - before });
  }
  let [place, ordered] = [0, pairs];
  const showPair = async () => {
    const { first, last, gain } = ordered[place];
    const head = first[0];
    const side = async (rollouts) => element("div", {}, element("h3", {}, when(rollouts[0])),
      element("div", { class: "cards", tabindex: "0", role: "group", "aria-label": when(rollouts[0]) }, ...(await Promise.all(rollouts.map(card)))));
    const [prompt, ...sides] = await Promise.all([promptOf(head), side(first), side(last)]);
    const said = gain === null ? "" : ` – mean reward ${gain < 0 ? "−" : "+"}${number(Math.abs(gain))}`;
    const move = (by, title) => element("button", { type: "button", disabled: place + by < 0 || place + by >= ordered.length, onclick: () => { place += by; showPair(); } }, title);
    $("pair").replaceChildren(...[
      element("h3", {}, `${tasks[columns.task[head]]}${runs.length > 1 ? `, ${runs[columns.run[head]]}` : ""}${said}`),
      element("div", { class: "pager" }, move(-1, "Previous question"), element("span", {}, `${place + 1} of ${ordered.length}`), move(1, "Next question")),
      prompt, element("div", { class: "sides" }, ...sides)].filter(Boolean));
  };
  if (pairs.length) {
    const orders = [["gain", "most improved first"], ["loss", "most worsened first"], ["given", "in order"]];
    const order = (value) => {
      const known = pairs.filter(({ gain }) => gain !== null);
      ordered = value === "given" ? pairs : known.sort((a, b) => (value === "gain" ? b.gain - a.gain : a.gain - b.gain));
      if (!ordered.length) ordered = pairs;
      place = 0;
      return showPair();
    };
    $("pair-filters").append(select("Questions", orders, order));
    await order("gain");
  } else {
    $("pair").append(element("p", { class: "quiet" }, "No question was asked at two different steps."));
  }
  update();
})();
