document.documentElement.classList.add("script");

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, i) => {
    const text = row.cells[i].dataset.v ?? row.cells[i].textContent.trim(), number = Number(text);
    return text === "" || Number.isNaN(number) ? text : number;
  };
  const order = (a, b) => {
    if (a === "" || b === "") return a === b ? 0 : null;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map(row => [value(row, i), row]);
      rows.sort(([a], [b]) => { const c = order(a, b); return c === null ? (a === "") - (b === "") : sign * c; });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

for (const tools of document.querySelectorAll(".tools")) {
  const graph = tools.nextElementSibling;
  let zoom = 1;
  tools.addEventListener("click", event => {
    const step = event.target.dataset.zoom;
    if (!step) return;
    zoom = step === "0" ? 1 : Math.min(3, Math.max(0.25, zoom * Number(step)));
    graph.style.setProperty("--zoom", zoom);
  });
}

addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details.print")) part.open = true;
});
