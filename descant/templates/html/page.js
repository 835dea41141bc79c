const tip = document.getElementById("tip"), keys = [...document.querySelectorAll("#legend button")];
const number = v => Math.abs(v) >= 1e6 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3) : String(+v.toPrecision(4));
for (const key of keys) key.onclick = () => {
  const off = key.classList.toggle("off");
  for (const path of document.querySelectorAll(`svg [data-g="${key.dataset.g}"]`)) path.classList.toggle("off", off);
};
for (const svg of document.querySelectorAll(".chart svg")) {
  const [step, value] = [svg.dataset.step, svg.dataset.value].map(numbers => {
    const [scale, offset] = numbers.split(" ").map(Number);
    return pixel => scale * pixel + offset;
  });
  const cursor = svg.querySelector(".cursor"), left = Number(cursor.getAttribute("d").match(/[\d.]+/)[0]);
  const lines = [...svg.querySelectorAll(".mean")].map(path => ({path, key: keys[path.dataset.g],
    points: path.getAttribute("d").slice(1).split("L").map(pair => pair.split(" ").map(Number))}));
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const shown = lines.filter(({path}) => !path.classList.contains("off")).map(({key, points}) => ({key,
      at: points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)}));
    if (!shown.length) return;
    const near = shown.reduce((a, b) => Math.abs(b.at[0] - x) < Math.abs(a.at[0] - x) ? b : a).at[0];
    cursor.setAttribute("transform", `translate(${near - left})`);
    cursor.style.visibility = "visible";
    tip.replaceChildren(`step ${Math.round(step(near)).toLocaleString("en")}`);
    const rows = shown.filter(({at}) => Math.abs(at[0] - near) <= 6)
      .sort((a, b) => Math.abs(a.at[1] - y) - Math.abs(b.at[1] - y)).slice(0, 12).sort((a, b) => a.at[1] - b.at[1]);
    for (const {key, at} of rows) {
      const row = document.createElement("div"), text = document.createElement("span");
      text.textContent = number(value(at[1]));
      row.append(key.querySelector("svg").cloneNode(true), text, key.textContent);
      tip.append(row);
    }
    tip.hidden = false;
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    tip.style.left = `${Math.max(0, right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16)}px`;
    tip.style.top = `${Math.max(0, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight))}px`;
  };
  svg.onpointerleave = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
}
for (const image of document.querySelectorAll(".images img"))
  image.onclick = () => image.closest("figure").classList.toggle("large");
