"use strict";
const runs = JSON.parse(document.getElementById("runs").textContent);
const text = value => typeof value === "number" ? String(Math.round(value * 1e4) / 1e4) : value === null ? "" : String(value);
const line = values => Object.entries(values).map(([name, value]) => `${name} ${text(value)}`).join(", ");
function element(kind, content) { const made = document.createElement(kind); made.textContent = content; return made; }
function show(box, samples, shown) {
  box.replaceChildren();
  for (const s of samples.slice(0, shown)) {
    const card = element("div", "");
    card.append(element("b", line(s.tags)));
    for (const name of ["target", "output"]) if (s[name] !== null) card.append(element("pre", `${name}: ${s[name]}`));
    card.append(element("p", `${line(s.scores)}; prompt of ${s.prompt_tokens} tokens, ${s.prompt_hash}`));
    box.append(card);
  }
  if (samples.length > shown) {
    const more = element("button", `show all ${samples.length}`);
    more.onclick = () => show(box, samples, samples.length);
    box.append(more);
  }
}
for (const details of document.querySelectorAll("details[data-run]"))
  details.addEventListener("toggle", () => {
    if (!details.open) delete details.dataset.filter;
    else if (!details.dataset.filter) show(details.querySelector(".samples"), runs[details.dataset.run], 50);
  });
for (const button of document.querySelectorAll("table.map button[data-run]"))
  button.addEventListener("click", () => {
    const {run, xTag, x, yTag, y} = button.dataset, details = document.querySelector(`details[data-run="${run}"]`);
    for (const other of document.querySelectorAll("table.map button")) other.setAttribute("aria-pressed", other === button);
    details.dataset.filter = "cell"; details.open = true;
    show(details.querySelector(".samples"), runs[run].filter(s => text(s.tags[xTag]) === x && text(s.tags[yTag]) === y), 50);
    details.scrollIntoView({behavior: "smooth", block: "nearest"});
  });
